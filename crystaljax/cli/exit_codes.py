"""What the command line returns besides 0."""

BAD_INPUT, INTERRUPTED = 2, 130
PROBLEMS = 1
"""Something is wrong in a store or a file: ``store verify`` found it, other commands left it out."""
