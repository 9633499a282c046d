//! How the flat buffers are cut for the exchange between workers.
//!
//! Buckets follow each other as a backward pass completes them: from the last layer to the first, and the shared embedding with all norms and
//! biases at the end. Order and cuts depend on the model only, so that every worker exchanges the same ranges in the same order, and a run
//! gives the same bits each time.

use std::collections::HashMap;
use std::ops::Range;

/// A bucket is closed when it holds this many floats (4 MiB): large enough for the transport's bandwidth, small enough to start early.
pub const BUCKET_FLOATS_MIN: usize = 1 << 20;

/// One parameter of the flat buffer.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// First float.
    pub offset: usize,
    /// Floats up to the next parameter, padding included.
    pub length: usize,
}

/// A range of the flat buffer that is exchanged in one operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where it lies.
    pub range: Range<usize>,
    /// Whether its parameters have weight decay; never only some of them.
    pub is_decayed: bool,
}

/// All segments of a model, in buckets. What is known before the pass ends is in the buckets before the last; the last one holds the embedding,
/// the norms and the biases.
#[derive(Debug)]
pub struct Buckets {
    segments: Vec<Segment>,
    cuts: Vec<Bucket>,
    bucket_of: HashMap<usize, usize>,
}

#[derive(Debug)]
struct Bucket {
    segments: Range<usize>,
    num_parameters: usize,
}

impl Buckets {
    /// Cuts a buffer of `total` floats. `matrices` lie in it in the order of the forward pass, the shared embedding first; everything else
    /// is behind them. A bucket is closed when it holds `floats_min`.
    pub fn new(matrices: &[Place], total: usize, floats_min: usize) -> Self {
        let mut cut = Self { segments: Vec::new(), cuts: Vec::new(), bucket_of: HashMap::new() };
        let mut open: Option<(Range<usize>, usize)> = None;
        for place in matrices.iter().skip(1).rev() {
            let end = place.offset + place.length;
            let (range, num_parameters) = open.take().unwrap_or((end..end, 0));
            cut.bucket_of.insert(place.offset, cut.cuts.len());
            let (range, num_parameters) = (place.offset..range.end, num_parameters + 1);
            if range.len() >= floats_min {
                cut.close(vec![Segment { range, is_decayed: true }], num_parameters);
            } else {
                open = Some((range, num_parameters));
            }
        }
        if let Some((range, num_parameters)) = open {
            cut.close(vec![Segment { range, is_decayed: true }], num_parameters);
        }
        let embedding_end = matrices.first().map_or(0, |place| place.offset + place.length);
        let matrices_end = matrices.last().map_or(0, |place| place.offset + place.length);
        let embedding = Segment { range: 0..embedding_end, is_decayed: true };
        let rest = Segment { range: matrices_end..total, is_decayed: false };
        cut.close(vec![embedding, rest], 0);
        cut
    }

    fn close(&mut self, segments: Vec<Segment>, num_parameters: usize) {
        let start = self.segments.len();
        self.segments.extend(segments);
        self.cuts.push(Bucket { segments: start..self.segments.len(), num_parameters });
    }

    /// All segments, bucket by bucket.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// Number of buckets, at least 1.
    pub fn num_buckets(&self) -> usize {
        self.cuts.len()
    }

    /// The last bucket, which is complete when the pass has ended.
    pub fn last(&self) -> usize {
        self.cuts.len() - 1
    }

    /// The segments of a bucket, as indices.
    pub fn segments_of(&self, bucket: usize) -> Range<usize> {
        self.cuts[bucket].segments.clone()
    }

    /// The bucket of a segment.
    pub fn bucket_of_segment(&self, segment: usize) -> usize {
        self.cuts.partition_point(|bucket| bucket.segments.end <= segment)
    }

    /// The bucket that waits for a parameter, by its offset; `None` for those of the last.
    pub fn bucket_of_parameter(&self, offset: usize) -> Option<usize> {
        self.bucket_of.get(&offset).copied()
    }

    /// Parameters that a bucket waits for.
    pub fn num_parameters(&self, bucket: usize) -> usize {
        self.cuts[bucket].num_parameters
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Matrices of these lengths one after another.
    fn places(lengths: &[usize]) -> Vec<Place> {
        let starts = lengths.iter().scan(0, |end, length| {
            *end += length;
            Some(*end - length)
        });
        starts.zip(lengths).map(|(offset, &length)| Place { offset, length }).collect()
    }

    fn ranges(buckets: &Buckets, bucket: usize) -> Vec<(usize, usize)> {
        buckets.segments_of(bucket).map(|segment| &buckets.segments()[segment].range).map(|range| (range.start, range.end)).collect()
    }

    #[test]
    fn every_float_is_in_one_bucket_and_late_layers_come_first() {
        let buckets = Buckets::new(&places(&[100, 8, 8, 8, 4]), 130, 12);
        assert_eq!((buckets.num_buckets(), buckets.last()), (3, 2));
        assert_eq!([ranges(&buckets, 0), ranges(&buckets, 1)], [[(116, 128)], [(100, 116)]]);
        assert_eq!(ranges(&buckets, 2), [(0, 100), (128, 130)]);
        assert_eq!(buckets.segments().iter().map(|segment| segment.is_decayed).collect::<Vec<_>>(), [true, true, true, false]);
        assert_eq!([0, 1, 2].map(|bucket| buckets.num_parameters(bucket)), [2, 2, 0]);
        assert_eq!([116, 100, 0, 128].map(|offset| buckets.bucket_of_parameter(offset)), [Some(0), Some(1), None, None]);
        assert_eq!([0, 1, 2, 3].map(|segment| buckets.bucket_of_segment(segment)), [0, 1, 2, 2]);
    }

    #[test]
    fn a_bucket_that_stays_small_is_closed_at_the_end() {
        let buckets = Buckets::new(&places(&[10, 4, 4]), 20, 1000);
        assert_eq!([ranges(&buckets, 0), ranges(&buckets, 1)], [vec![(10, 18)], vec![(0, 10), (18, 20)]]);
        assert_eq!(buckets.num_parameters(0), 2);
        let alone = Buckets::new(&places(&[10]), 12, 1);
        assert_eq!((alone.num_buckets(), ranges(&alone, 0)), (1, vec![(0, 10), (10, 12)]));
    }
}
