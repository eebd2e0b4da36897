"""DVS128 Gesture (Amir et al., 2017); `dvs_gesture.py` reads it."""

from pydantic import Field

from spikefleet_pipelines.sources.source import Source, SourceOptions


class DvsGestureOptions(SourceOptions):
    """Validation recordings; train and test are the data set's own, which have different people."""

    holdout: float = Field(
        default=0.1,
        ge=0.0,
        lt=1.0,
        description="fraction of the training people whose gestures become val; 0: train on all of them",
    )


DVS_GESTURE = Source(
    name="dvs_gesture",
    description="DVS128 Gesture: 11 gestures of arms and hands, 128x128; a recording is one gesture",
    reader="spikefleet_pipelines.sources.dvs_gesture:read_dvs_gesture",
    options=DvsGestureOptions,
    files="trials_to_train.txt, trials_to_test.txt and the files they list, *.aedat and *_labels.csv (or "
    "ibmGestureTrain/ and ibmGestureTest/ with user*/*.npy, as tonic has it),",
    events=True,
)
