"""PEFT's own tests, from its sdist, with this library beneath them and without: the same outcomes, and how many calls ran fused."""
