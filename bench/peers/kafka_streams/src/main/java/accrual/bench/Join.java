package accrual.bench;

import com.fasterxml.jackson.annotation.JsonIgnoreProperties;
import com.fasterxml.jackson.annotation.JsonProperty;
import com.fasterxml.jackson.databind.JsonNode;
import java.time.Duration;
import java.time.Instant;
import java.util.HashMap;
import java.util.Map;
import java.util.Properties;
import org.apache.kafka.clients.consumer.ConsumerConfig;
import org.apache.kafka.clients.consumer.ConsumerRecord;
import org.apache.kafka.clients.producer.ProducerConfig;
import org.apache.kafka.common.serialization.Serde;
import org.apache.kafka.common.serialization.Serdes;
import org.apache.kafka.streams.KafkaStreams;
import org.apache.kafka.streams.StreamsBuilder;
import org.apache.kafka.streams.StreamsConfig;
import org.apache.kafka.streams.kstream.Consumed;
import org.apache.kafka.streams.kstream.JoinWindows;
import org.apache.kafka.streams.kstream.Produced;
import org.apache.kafka.streams.kstream.StreamJoined;
import org.apache.kafka.streams.processor.TimestampExtractor;

/**
 * Predictions joined with their outcomes by Kafka Streams: a windowed stream-stream join in event time, exactly once.
 *
 * <p>Arguments, each {@code --name value}: bootstrap, predictions, outcomes, output, group, state.
 */
public final class Join {
    /** The contract of the events' stream: how long an outcome may take, and how far events may be out of order. */
    private static final JoinWindows HORIZON =
            JoinWindows.ofTimeDifferenceAndGrace(Duration.ofDays(14), Duration.ofHours(6));

    @JsonIgnoreProperties(ignoreUnknown = true)
    record Prediction(
            @JsonProperty("prediction_id") String predictionId,
            String stream,
            String model,
            @JsonProperty("predicted_at") String predictedAt,
            JsonNode inputs,
            JsonNode output) {}

    @JsonIgnoreProperties(ignoreUnknown = true)
    record Outcome(
            @JsonProperty("prediction_id") String predictionId,
            String stream,
            @JsonProperty("observed_at") String observedAt,
            JsonNode values) {}

    record GroundTruth(
            @JsonProperty("prediction_id") String predictionId,
            String stream,
            String status,
            String label,
            String model,
            @JsonProperty("predicted_at") String predictedAt,
            @JsonProperty("observed_at") String observedAt,
            JsonNode inputs,
            JsonNode output,
            JsonNode values) {
        static GroundTruth of(Prediction said, Outcome seen) {
            return new GroundTruth(
                    said.predictionId,
                    said.stream,
                    "labeled",
                    seen.values.get("intent").textValue(),
                    said.model,
                    said.predictedAt,
                    seen.observedAt,
                    said.inputs,
                    said.output,
                    seen.values);
        }
    }

    /** Event time is what the payload says; the topics' own timestamps say when a record reached the broker. */
    static final class EventTime implements TimestampExtractor {
        @Override
        public long extract(ConsumerRecord<Object, Object> record, long partitionTime) {
            String moment =
                    record.value() instanceof Prediction said ? said.predictedAt : ((Outcome) record.value()).observedAt;
            return Instant.parse(moment).toEpochMilli();
        }
    }

    public static void main(String[] arguments) throws InterruptedException {
        Map<String, String> given = new HashMap<>();
        for (int i = 0; i + 1 < arguments.length; i += 2) {
            given.put(arguments[i].substring(2), arguments[i + 1]);
        }
        KafkaStreams streams = new KafkaStreams(topology(given).build(), settings(given));
        Runtime.getRuntime().addShutdownHook(new Thread(() -> streams.close(Duration.ofSeconds(20))));
        streams.setStateListener((now, before) -> {
            if (now == KafkaStreams.State.ERROR) {
                Runtime.getRuntime().halt(1);
            }
        });
        streams.start();
        Thread.currentThread().join();
    }

    private static StreamsBuilder topology(Map<String, String> given) {
        Serde<String> id = Serdes.String();
        Serde<Prediction> prediction = Json.of(Prediction.class);
        Serde<Outcome> outcome = Json.of(Outcome.class);
        StreamsBuilder builder = new StreamsBuilder();
        EventTime eventTime = new EventTime();
        builder.stream(given.get("predictions"), Consumed.with(id, prediction).withTimestampExtractor(eventTime))
                .join(
                        builder.stream(
                                given.get("outcomes"), Consumed.with(id, outcome).withTimestampExtractor(eventTime)),
                        GroundTruth::of,
                        HORIZON,
                        StreamJoined.with(id, prediction, outcome))
                .to(given.get("output"), Produced.with(id, Json.of(GroundTruth.class)));
        return builder;
    }

    private static Properties settings(Map<String, String> given) {
        Properties settings = new Properties();
        settings.put(StreamsConfig.APPLICATION_ID_CONFIG, given.get("group"));
        settings.put(StreamsConfig.BOOTSTRAP_SERVERS_CONFIG, given.get("bootstrap"));
        settings.put(StreamsConfig.STATE_DIR_CONFIG, given.get("state"));
        settings.put(StreamsConfig.PROCESSING_GUARANTEE_CONFIG, StreamsConfig.EXACTLY_ONCE_V2);
        settings.put(StreamsConfig.COMMIT_INTERVAL_MS_CONFIG, 200);
        // The worker has one core.
        settings.put(StreamsConfig.NUM_STREAM_THREADS_CONFIG, 1);
        // Started again, it has its partitions back at once.
        settings.put(StreamsConfig.mainConsumerPrefix(ConsumerConfig.GROUP_INSTANCE_ID_CONFIG), "worker");
        settings.put(StreamsConfig.consumerPrefix(ConsumerConfig.AUTO_OFFSET_RESET_CONFIG), "earliest");
        // Larger than the defaults, which are made for small latencies: without these it is slower.
        settings.put(StreamsConfig.consumerPrefix(ConsumerConfig.MAX_POLL_RECORDS_CONFIG), 5_000);
        settings.put(StreamsConfig.producerPrefix(ProducerConfig.BATCH_SIZE_CONFIG), 256 * 1024);
        settings.put(StreamsConfig.producerPrefix(ProducerConfig.COMPRESSION_TYPE_CONFIG), "lz4");
        return settings;
    }
}
