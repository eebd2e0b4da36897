"""`make gpu`: what a CUDA device computes, how fast, and a short training on it; needs no network, Ray or MLflow."""
