"""Speed, memory and differences, each as a ratio taken in one run on one machine."""
