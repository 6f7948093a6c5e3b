"""HTTP/1.1: connections, their limits, and how they end. Knows no models."""
