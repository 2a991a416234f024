"""The handlers of requests, grouped by what a request is about: names, attributes, open files, directories."""
