"""Programs to run and to read; packages only so that parts of them (data, baselines, pictures) can be imported from the root."""
