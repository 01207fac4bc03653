"""Model files: one a family, each reads like its paper.

A model is a Linen module that takes `inputs(batch)` and `train=` and returns a dict:

  "image"       [B, H, W, C]  the scaled input, float32
  "grid"        [B, h, w, D]  in the compute dtype; "tokens" [B, N, D] of text, and of
                              images of which only some patches are looked at
  "pooled"      [B, D]        what every evaluator uses, float32
  "pre_logits"  [B, R]        when the head has a hidden layer, float32
  "logits"      [B, C]        when there is a head, float32

What the program must know of a family beside that is in `types.Model`.
"""
