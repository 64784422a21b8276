"""Text-to-speech with CSM over HTTP and on the command line, on voxkern's kernels."""
