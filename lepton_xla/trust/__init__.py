"""Signatures and encryption of artifacts: keys, signature files, sealed files. Knows no artifact.

What is written here is bytes and formats; `compiler/protection.py` applies it to artifacts. Needs the extra `trust`.
"""

from lepton_xla.trust.keys import TrustedKeys, create_keys

__all__ = ["TrustedKeys", "create_keys"]
