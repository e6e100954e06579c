"""ProtoScale: train image-text models whose supervision is groups, sharded by DeepSpeed."""
