"""What answers requests: the routes, an infer request's way through the server, and one model's connections."""
