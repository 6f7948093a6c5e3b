"""What the package runs in: this machine, what is installed, XLA's flags; `leptonx doctor` examines all of it."""
