"""Federations over the network by Flower: its messages, its two apps, and the processes that run them."""
