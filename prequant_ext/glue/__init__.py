"""The GLUE benchmark on a pre-quantized model: tasks, metrics, training, and the experiment that compares methods."""
