"""The image of `k8s/`, built and run as its pods would be: `make image`, as root, on Debian."""
