"""What is wrong before a run begins: `python -m trainer doctor [RUN.yaml]`."""
