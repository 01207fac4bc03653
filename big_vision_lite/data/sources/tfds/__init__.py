"""Prepared TFDS sets, ArrayRecord or TFRecord, without TensorFlow."""
