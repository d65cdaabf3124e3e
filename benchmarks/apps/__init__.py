"""The apps that our service is compared with, each as small as possible."""
