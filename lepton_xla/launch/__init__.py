"""Starting the processes of one run: on this machine, and by files for the schedulers of others. Imports no JAX."""

from lepton_xla.launch.heartbeat import Beat, Heartbeat, beat
from lepton_xla.launch.membership import Membership
from lepton_xla.launch.startup import initialize

__all__ = ["Beat", "Heartbeat", "Membership", "beat", "initialize"]
