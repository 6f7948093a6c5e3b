"""Files and folders that others may read, write or break off at any time. Nothing here imports JAX."""
