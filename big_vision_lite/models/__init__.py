"""Vision backbones, one file per family, each written to read like its paper.

A model is a Linen module that takes `inputs(batch)` and `train=` and returns a dict:

  "image"       [B, H, W, C]  the scaled input, float32
  "grid"        [B, h, w, D]  in the compute dtype; replaced by "tokens" [B, N, D] for
                              text and for images with only some patches encoded
  "pooled"      [B, D]        pooled features that evaluators use, float32
  "pre_logits"  [B, R]        when the head has a hidden layer, float32
  "logits"      [B, C]        when there is a head, float32

`types.Model` declares the other properties of a family that the program needs.
"""
