"""Models as other programs keep them.

safetensors  the file format, read and written tensor by tensor
families     tables: their tensors and config fields beside ours
mapping      the tables applied to one model: which tensor goes where, and how it is turned
"""
