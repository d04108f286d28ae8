"""The transformer. It knows no mesh: attention kernel, expert dispatch and layer stack are passed in.

Weights arrive gathered.
"""
