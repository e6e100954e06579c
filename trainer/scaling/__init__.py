"""Scaling studies: which runs, how they are run, what law their errors follow, and the page."""
