"""Hugging Face folders to checkpoints and back.

safetensors         the file format, read tensor by tensor
safetensors_writer  and written
families            tables: their tensors and config fields beside ours
mapping             the tables applied to one model: which tensor goes where, and how it is turned
zarr                how an array lies in files
arrays              parameters in a checkpoint, a layer at a time
folders             config, tokenizer and templates; folders that appear when they are whole
convert             from_hf and to_hf
"""
