"""Change rates of the singular directions of frozen weights, and the decompositions they are measured at."""
