"""Sending what a run records to services: W&B and MLflow. Their packages are imported by the thread that sends."""
