"""The sections of a run file, one file each, and how text becomes them; `trainer.config` is their
front door."""
