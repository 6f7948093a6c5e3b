"""`python -m lepton_xla` is `leptonx`."""

from lepton_xla.cli import main

main(prog_name="leptonx")
