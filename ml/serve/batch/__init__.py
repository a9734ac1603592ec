"""Offline jobs: files of requests in OpenAI's Batch format, answered line by line, resumable."""

from ml.serve.batch.job import Job, JobResult

__all__ = ["Job", "JobResult"]
