"""Prediction heads on the aggregator's outputs: cameras, dense maps (depth, points, features), tracks."""
