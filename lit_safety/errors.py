"""The one exception for bad input: the command line prints it as a single line and exits with status 2."""


class UserError(Exception):
    """Something the user gave is wrong.

    The message is one line that names the file, the sample or the YAML key, and says what to do. Anything else
    that goes wrong is a defect of ours and keeps its traceback.
    """
