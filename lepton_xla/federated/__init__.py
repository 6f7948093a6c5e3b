"""Federated learning: training on rows that may not leave their owners, on Flower or simulated in one process."""

from lepton_xla.federated.partitions import partition
from lepton_xla.federated.results import Result, RoundReport
from lepton_xla.federated.settings import Federation, Privacy
from lepton_xla.federated.simulation import simulate
from lepton_xla.federated.specs import FederatedSpec

__all__ = ["FederatedSpec", "Federation", "Privacy", "Result", "RoundReport", "partition", "simulate"]
