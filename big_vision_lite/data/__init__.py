"""Sources, ops and the pipeline that turns them into global batches."""
