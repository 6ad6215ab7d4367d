"""The function transformation: the only files that know jaxprs, by public names of JAX alone."""
