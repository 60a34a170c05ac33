"""A server of one quantized base and any number of tasks on it, whose requests share batches: ``prequant serve``.

backbone.py has the model and its tasks, batcher.py the one thread that runs it, app.py what HTTP says, page.py what a
browser shows, server.py start and end.
"""
