"""Pure functions of tensors and a Comm; each returns the mean over this rank's samples."""
