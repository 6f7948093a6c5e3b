"""Rows to train on: what columns hold, what is missing or far off, and statistics that go into the artifact."""

from lepton_xla.data.batches import batches
from lepton_xla.data.rows import split, unique
from lepton_xla.data.schemas import Category, Number, Prepared, Schema

__all__ = ["Category", "Number", "Prepared", "Schema", "batches", "split", "unique"]
