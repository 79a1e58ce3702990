"""The watch: is the proxy still climbing for the right reason?"""
