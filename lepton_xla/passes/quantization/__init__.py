"""Quantization of weights and activations: post-training, in training (QAT), and with integer products."""
