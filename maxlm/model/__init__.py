"""The transformer. It knows no mesh: attention kernel and layer stack are passed in, weights arrive gathered."""
