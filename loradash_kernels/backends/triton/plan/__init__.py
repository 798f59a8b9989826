"""From problems to launches, a file for each pass: what a call runs, as data."""
