"""Stages that run on the accelerator: configuration, data, model, quantization, training, evaluation, gate."""
