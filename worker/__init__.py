"""Claims jobs, runs them in batches over many adapters, and publishes one result a job."""
