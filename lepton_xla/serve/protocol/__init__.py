"""The Open Inference Protocol v2: bytes to requests, results to bytes, routes and documents. Knows no sockets."""
