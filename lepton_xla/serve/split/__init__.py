"""Serving by several processes: front-ends that speak HTTP, one engine that owns the device, and their supervisor.

The front-ends decode requests and never import JAX; tensors lie in shared memory, and descriptors of a few bytes travel
over Unix sockets. Nothing is pickled.
"""
