"""The measurements that the README quotes, each runnable by one command."""
