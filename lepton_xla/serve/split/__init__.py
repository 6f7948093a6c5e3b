"""Serving by several processes: workers that do all of it, or front-ends beside one engine, and their supervisor.

Front-ends speak HTTP and never import JAX; the engine owns the device. Tensors lie in shared memory, and descriptors of
a few bytes travel over Unix sockets. Nothing is pickled.
"""
