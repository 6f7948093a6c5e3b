"""Operations that the optional package `lepton-xla-kernels` computes on CPUs, and XLA everywhere else."""
