"""`fedclip report`: one HTML page of runs and sweeps, and its figures and table as files. Imports no PyTorch."""
