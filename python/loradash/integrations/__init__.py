"""What belongs to other people's frameworks: one file for each, which imports its framework inside its functions."""
